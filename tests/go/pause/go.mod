module meshlib.tests/pause

go 1.26.0
