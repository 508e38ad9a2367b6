"""Networks that RISAM is compared with, on the same encoders, data and schedule."""
