"""Write HTML reports of a run, of several runs or of a sweep, and check a dataset before anything is computed."""
