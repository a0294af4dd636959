# Sourced by recipes that run llama.cpp's server: sets LLAMA_CPP, its source, and LLAMA_SERVER, its binary for this machine's instructions.
# Wants $results, a folder, and $python. LLAMA_CPP=FOLDER is a source of June 2026 or later; without it the one inside llama-cpp-python
# 0.3.36 is fetched. Needs cmake and a C++ compiler; on two cores about 10 minutes. JOBS: compilers at a time.
if [ -z "${LLAMA_CPP:-}" ]; then
    LLAMA_CPP=$results/llama_cpp_python-0.3.36/vendor/llama.cpp
    if [ ! -d "$LLAMA_CPP" ]; then
        $python -m pip download -q --no-deps --no-binary llama-cpp-python -d "$results" llama-cpp-python==0.3.36
        tar -xzf "$results/llama_cpp_python-0.3.36.tar.gz" -C "$results"
    fi
fi
export LLAMA_SERVER=${LLAMA_SERVER:-$results/llama.cpp/bin/llama-server}
if [ ! -x "$LLAMA_SERVER" ]; then # without tests, the page for browsers, and TLS
    cmake -S "$LLAMA_CPP" -B "$results/llama.cpp" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    cmake --build "$results/llama.cpp" --target llama-server -j "${JOBS:-2}"
fi
