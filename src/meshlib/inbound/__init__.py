"""Who calls in? The edges through which requests reach the application, one file for each kind of server."""
