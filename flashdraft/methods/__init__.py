"""One file per decoding method, network and drafter together; `network` is what the draft networks
share."""
