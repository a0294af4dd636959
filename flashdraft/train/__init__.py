"""From prompts to a drafter in stages that read and write files: prompts, regenerate, features,
train; each one resumes.
"""
