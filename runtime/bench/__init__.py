"""Measurements of the gateway on this machine; `almanac bench-runtime` prints them."""
