"""The service; see `serve/app.py`."""
