# docker build -t lmoe .
# docker run -p 127.0.0.1:8000:8000 -e LMOE_API_KEY -v "$PWD/outputs:/models:ro" lmoe --checkpoint /models/RUN
FROM python:3.12-slim

# An index with builds of torch for the CPU alone makes an image that is 3 GB smaller; empty: what the package index gives,
# which computes on a GPU too. PyTorch's own page on installing names it.
ARG TORCH_INDEX=""

RUN useradd --create-home --uid 1000 lmoe
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lmoe lmoe
COPY conf conf
COPY data data
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch; fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve]" \
    && rm -rf /src/*

USER lmoe
WORKDIR /home/lmoe
EXPOSE 8000
# The whole server: keys come by -e LMOE_API_KEY, or by LMOE_API_KEY_FILE and a mounted file; never by an argument.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["lmoe", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "tiny"]
