"""The release, in one place: the package, plan caches and calibration records ask for it here."""

__version__ = "0.1.0"
