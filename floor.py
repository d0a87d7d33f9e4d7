import urllib.request
urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:47719/api/ingest",b'{"a":1}',{"X-PackTrack-Key":"k","Content-Type":"application/json"})).read()
