"""Token ids in, token ids out: requests, their schedule, the KV cache's pages, and sampling."""
