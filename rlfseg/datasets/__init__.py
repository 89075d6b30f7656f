"""Data sets as plans of records and samples: drawn scenes, and folders of images with masks."""
