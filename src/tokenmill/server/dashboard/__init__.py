"""The dashboard: one page, made on the server, refreshed by small fetches; nothing external."""

from tokenmill.server.dashboard.history import ErrorLine, Gauges, History
from tokenmill.server.dashboard.page import DashboardPages, PageConfig
from tokenmill.server.dashboard.today import Books, Ledger, Today
from tokenmill.server.dashboard.view import BatchLine, Sources, View, make_view

__all__ = [
    "BatchLine",
    "Books",
    "DashboardPages",
    "ErrorLine",
    "Gauges",
    "History",
    "Ledger",
    "PageConfig",
    "Sources",
    "Today",
    "View",
    "make_view",
]
