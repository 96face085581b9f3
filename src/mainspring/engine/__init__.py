"""Paged KV blocks, scheduler, model runner, sampler and the engine over them."""
