"""A microVM in a worker process of its own, behind walls (docs/security.md).

`remote` is the side of the user's program, `worker` the other one; `messages` is what they say to
each other, `launch` starts the process and sees it end, `files` is what it is handed.
"""
