"""Videos asked for as data (job.py), made in batches (batch.py), and written with the record of how they were made."""
