"""The commands as jobs: `python -m jobs.NAME`, for `ray job submit`.

A job runs in its own copy of the repository, which goes when the job does. So its paths are absolute, in a folder that
every node sees, and it records to an MLflow server that every node reaches (jobs/train.py shows how).
"""
