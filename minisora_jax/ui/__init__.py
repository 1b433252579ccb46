"""The browser page. uploads.py checks files, form_fields.py has the form of each task, forms.py turns a filled-in form
into a job, job_queue.py runs the jobs of all visitors, gallery.py stores results, show.py renders HTML, page.py lays
out the page, and server.py serves it.
"""
