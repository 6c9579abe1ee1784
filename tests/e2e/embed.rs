//! The host as a library: the example of docs/embed.md is compiled and run here as it stands.

#[path = "../../host/app/examples/embed.rs"]
mod example;

#[test]
fn the_example_of_embedding_runs() {
    example::main().expect("the example holds");
}
