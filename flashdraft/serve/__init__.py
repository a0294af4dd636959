"""The server: OpenAI's HTTP interface in front of the engine.

errors, fields, protocol            what a client may send, and how it is refused
translate                           a body -> what the engine is asked for
tokens, logprobs, usage, choices    parts of an answer
replies                             what the engine gave out -> bodies and stream chunks
"""
