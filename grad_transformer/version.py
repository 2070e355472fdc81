"""The version, said once: packaging and `grad-transformer --version` read it here."""

__version__ = "0.1.0"
