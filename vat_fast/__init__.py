"""vat_fast: a fast VAT (Vision Action Transformer, arXiv 2512.06013)."""

from vat_fast.config import ConfigError, VATConfig
from vat_fast.frozen.engine import FrozenVAT
from vat_fast.model import VAT, VATDetails
from vat_fast.policy import Policy, PolicyConfig
from vat_fast.reference import ReferenceVAT

__version__ = "0.1.0"

__all__ = ["VAT", "ConfigError", "FrozenVAT", "Policy", "PolicyConfig", "ReferenceVAT", "VATConfig", "VATDetails"]
