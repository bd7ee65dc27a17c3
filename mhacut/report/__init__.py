"""A report on one checkpoint as a page that stands by itself, or as a picture."""
