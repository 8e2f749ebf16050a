"""OpenAI's API over HTTP (the extra `serve`): `pronghorn serve`. docs/serving.md says what it takes and gives."""
