"""The demo's network: trained here on the digits, once, then read from its folder."""
