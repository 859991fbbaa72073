"""The real vLLM and transformers on the CPU, over a cache that modelcached made; `make system-vllm` runs it."""
