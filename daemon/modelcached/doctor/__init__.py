"""The checklist that a person would go through, by whoever can see what the daemon sees. Changes nothing that stays."""

from modelcached.doctor.examination import Doctor, Surroundings
from modelcached.doctor.finding import Finding, Level

__all__ = ["Doctor", "Finding", "Level", "Surroundings"]
