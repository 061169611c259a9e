"""Settings files and the formats of other programs: read, reviewed, changed and written."""
