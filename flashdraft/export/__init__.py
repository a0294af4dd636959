"""Drafters as other engines read them: one file an engine.

Each knows its engine's keys, tensor names and command line, and what that engine cannot have.
None knows how a drafter runs here.
"""
