//! Clients that are connected, subscribed to one topic each and silent, until stdin ends.

use std::error::Error;
use std::io::Read;

use crate::args::Args;
use crate::conn::Conn;

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let port: u16 = args.required("port")?;
    let connections: usize = args.or("connections", 1000)?;
    args.finish()?;
    let mut held = Vec::with_capacity(connections);
    for number in 0..connections {
        let filter = format!("bench/idle/{number}/commands");
        let client_id = format!("idle-{number}");
        held.push(Conn::open(port, &client_id, true, Some((&filter, 1)), number)?);
    }
    println!(r#"{{"connected":{connections}}}"#);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(format!(r#"{{"held":{}}}"#, held.len()))
}
