"""What a person calls from Python, beside `VideoPipeline`: training.py, encoding.py and notebook.py."""
