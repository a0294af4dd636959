"""The lossless rule and what surrounds it, as pure functions: laws, trees, verification, draft
lengths, text.
"""
