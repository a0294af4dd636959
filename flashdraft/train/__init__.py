"""From prompts to a drafter, as stages that read files and write files: prompts, regenerate, features, train.

Running a stage again resumes it.
"""
