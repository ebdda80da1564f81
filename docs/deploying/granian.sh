#!/bin/sh
# granian.sh --port 8080 --workers 2 shop:app
exec granian --interface wsgi --blocking-threads 8 "$@"
