//! Linking: relative relocations in their packed form (DT_RELR), 1.1 MB less of a position-independent binary. glibc has
//! it from 2.36 on (Debian 12); GNU ld and lld know the option for x86-64, GNU ld of Debian 12 for no other target.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let of_target = |key: &str| std::env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    if of_target("ARCH") == "x86_64" && of_target("OS") == "linux" && of_target("ENV") == "gnu" {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
