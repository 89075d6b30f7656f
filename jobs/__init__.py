"""The commands as jobs: `python -m jobs.NAME`, for `ray job submit`."""
