"""Pages that one looks at: a single HTML file each, which reads nothing from anywhere."""

from fxquant.report.html.page import Section, write_page
from fxquant.report.html.sections import report_sections

__all__ = ["Section", "report_sections", "write_page"]
