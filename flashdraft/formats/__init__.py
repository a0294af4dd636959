"""Drafters' folders, one file a job: `config` (what config.json says), `parse` (its keys), `read`,
`write`, `match` (beside a target) and `foreign` (what is refused by name).
"""
