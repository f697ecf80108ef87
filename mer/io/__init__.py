"""Bytes on disk to leased buffers: GGUF headers, expert extents, the arena, the buffer pool, readers, the fetcher."""
