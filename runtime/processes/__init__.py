"""One gateway of several processes: workers pass bytes on, a hub decides.

============  =====================================================================================
module        holds
============  =====================================================================================
`channel`     messages between two processes over a Unix-domain socket
`remote`      the worker's desk: the seam of `runtime.desk`, answered by the hub
`worker`      a worker process: parses HTTP, forwards and streams; everything else goes to the hub
`session`     one worker as the hub knows it; what it holds is given back when it is gone
`crew`        the hub: owns the state of the gateway, starts workers, and starts them again
============  =====================================================================================

All workers accept from one listening socket and decide nothing: each call is placed in the hub,
synchronously and with everything in view, so N workers behave as one gateway.
"""
