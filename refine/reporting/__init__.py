"""The report of a run: one page that holds all it shows. Folders are read into plain data (``collect``), drawn
(``charts``), put into words and tables (``page``) and written (``write``). Nothing here knows a model."""

from refine.reporting.write import ReportError, write_report

__all__ = ["ReportError", "write_report"]
