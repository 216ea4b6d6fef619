"""Which deployment answers a call: engines here and endpoints elsewhere, behind one name."""

from tokenmill.router.backend import Attempt, Backend, BackendState, Embedded, Job, Prepared, Spent

__all__ = ["Attempt", "Backend", "BackendState", "Embedded", "Job", "Prepared", "Spent"]
