#!/bin/sh
# Builds every guest for wasm32-unknown-unknown and turns it into a component.
#
#     plugins/build.sh            build into plugins/prebuilt and record digests in manifest.json
#     plugins/build.sh --check    build, change nothing; compare sources, and bytes where the compiler is the same
#
# Two toolchains will do. With rustup: `rustup target add wasm32-unknown-unknown`. Without its download server: a distribution's
# compiler with the sources of std (Debian 12: `apt-get install rustc-web rust-web-src lld`), out of which std is built here.
set -eu
cd "$(dirname "$0")"
plugins=$(pwd)
target=wasm32-unknown-unknown

libdir=$(rustc --print target-libdir --target $target 2>/dev/null || true)
if ls "$libdir"/libstd-*.rlib >/dev/null 2>&1; then
    compiler=rustc
    build_std=
else
    compiler=/usr/bin/rustc
    library=$("$compiler" --print sysroot 2>/dev/null || true)/lib/rustlib/src/rust/library
    if [ ! -d "$library" ]; then
        echo "build.sh: no standard library for $target: run 'rustup target add $target'," >&2
        echo "build.sh: or install a compiler in /usr/bin with its sources (Debian: rustc-web rust-web-src lld)" >&2
        exit 1
    fi
    export RUSTC="$compiler" RUSTC_BOOTSTRAP=1
    build_std=-Zbuild-std=std,panic_abort
    # The first linker that exists: rustup's own, then a distribution's.
    for linker in "$(rustup which rustc 2>/dev/null | sed 's,/bin/rustc$,,')"/lib/rustlib/*/bin/rust-lld \
        /usr/bin/wasm-ld /usr/bin/wasm-ld-*; do
        [ -x "$linker" ] && break
    done
    export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER="$linker"
    # Panic messages carry paths of std: the real folder behind the sysroot's link, too.
    remap_std="--remap-path-prefix=$library=/std --remap-path-prefix=$(realpath "$library")=/std"
fi
version=$("$compiler" --version)

# No path of this machine may reach a component: builds are compared byte by byte.
remap="--remap-path-prefix=$plugins=/plugins ${remap_std:-}"
for sources in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*; do
    remap="$remap --remap-path-prefix=$sources=/cargo"
done
export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="$remap"

guests=
for manifest in */Cargo.toml fixtures/*/Cargo.toml; do
    grep -q cdylib "$manifest" && guests="$guests $(sed -n 's/^name = "\(.*\)"$/\1/p' "$manifest" | head -n 1)"
done

# shellcheck disable=SC2046,SC2086 # guest names and flags have no spaces
cargo build --locked --release --target $target $build_std $(printf -- '-p %s ' $guests)
unset RUSTC RUSTC_BOOTSTRAP
# shellcheck disable=SC2086
cargo run --locked --quiet -p componentize -- "${1:-}" "$version" "${CARGO_TARGET_DIR:-target}/$target/release" $guests
