"""What is measured, and how: tasks, runs with provenance, tables made from their files alone, and a
step's parts."""
