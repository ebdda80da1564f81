#!/bin/sh
# development.sh shop:app --port 8080
app=$1
shift
exec flask --app "$app" run --reload "$@"
