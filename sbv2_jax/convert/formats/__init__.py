"""Model directories and files in the formats of the field, read and written."""
