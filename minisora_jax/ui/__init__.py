"""A page in the browser over generate/: uploads.py lets files in, forms.py makes jobs of what is filled in, line.py
does them for everyone who waits, gallery.py keeps what was made, page.py is what one sees, server.py what one asks.
"""
