"""Tests: unit, the test Hub and its faithfulness, integration (real daemon, real clients), system."""
