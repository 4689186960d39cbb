"""Peers without a server: what each remembers, offers its neighbours and makes of their offers."""
