"""The server: OpenAI's HTTP interface in front of the engine.

errors, faults                      how a request is refused
strictjson, fields, protocol        bytes -> a body, every field of which is implemented
talk, turns, tools                  a chat -> tokens; its answer -> reasoning, content, calls
constraint, translate               a body -> what the engine is asked for
tokens, logprobs, usage, choices    parts of an answer
replies                             what the engine gave out -> bodies and stream chunks
"""
