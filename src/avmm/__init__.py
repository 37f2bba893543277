"""avmm: an asyncio microVM monitor on Linux KVM."""
