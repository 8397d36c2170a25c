//! A slow origin to try things against: `cargo run --example origin -- FILE [RTT_MS [BYTES_PER_SECOND]]`. Prints the URL,
//! serves until its standard input ends, then prints what was asked.

use std::time::Duration;

use tarblk::internals::bench::origin::{Link, Origin};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let file = args.next().ok_or("usage: origin FILE [RTT_MS [BYTES_PER_SECOND]]")?;
    let rtt = Duration::from_millis(args.next().map_or(Ok(0), |it| it.parse())?);
    let rate = args.next().map(|it| it.parse()).transpose()?;
    let origin = Origin::start()?;
    origin.serve_file("/layer.tar", file.as_ref())?;
    origin.set_link(Link { rtt, rate });
    println!("{}", origin.url("/layer.tar"));
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    for event in origin.take_log().events {
        println!("{event:?}");
    }
    println!("{:?}", origin.counters());
    Ok(())
}
