"""Peers without a server: what each one remembers, offers its neighbours and makes of what they offer."""
