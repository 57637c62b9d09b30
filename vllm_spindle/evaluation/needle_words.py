"""The words of the needle task: keys, values and filler are all made of these 504."""

_TEXT = """
acid acorn actor alarm album alley amber anchor angel apple apron arch arena armor arrow ash
atlas attic aunt autumn avenue axle bagel baker bamboo banjo bank barley barn barrel basil
basin basket batch beach beacon beam bean bear beaver bell belt berry birch bird biscuit blade
blanket blaze board boat bolt bone book boot border boulder bow bowl box branch brass breeze
brick bridge brook broom brush bubble buckle buffalo bugle bundle bush butter cabin cable
cactus cake camel camera camp candle cannon canoe canvas canyon cape captain carbon card cargo
carpet carrot cart cave cedar cellar cello chain chair chalk cheese cherry chess chest chimney
choir cider circle circus citrus city clay cliff clock cloud clover coach coast cobalt coffee
comet compass cone copper coral cord cork cotton cougar cradle crane crater creek crown
crystal cup curtain cycle daisy dance deck deer delta desert desk dew dice dinner dock doctor
dog dollar dolphin door dove dragon drawer dream drift drum dune dust eagle earth echo eel elk
elm ember engine envelope fabric falcon feast feather fence fern ferry fiddle field film finch
fire fish flag flame fleet flint flock flood flour flower flute fog forest forge fork fossil
fountain frame frost fruit funnel fur galaxy garden gate gear giant ginger glacier glass globe
goat gold goose grain granite grape gravel grove guitar gull hail hammer harbor harp harvest
hat hawk hay hazel heart helmet hen herb heron hill hinge honey hood hook horn horse hotel
house igloo ink inn iris iron island ivory jacket jade jar jasmine jewel jungle kayak kernel
kettle key king kite kitten knot ladder lake lamb lamp lantern laurel lava lawn leaf leather
ledge lemon letter lilac lily lime linen lion lizard lobster lock lodge lotus lumber lynx
maple marble market marsh mask meadow medal mesa metal meteor milk mill mine mint mist mole
monk moon moose moss motor mountain mouse mule museum mustard nail nectar needle nest nickel
night north oak oar oasis oat ocean olive onion orange orchard orchid organ otter oven owl
paddle page palace palm panda paper parcel park parrot path peach peak pear pebble pencil
pepper piano pier pigeon pillow pine pipe planet plank plate plaza plum pocket poem pond pony
poplar poppy port potato prairie prism puddle pulley pumpkin quail quarry quartz queen quill
quilt radar radio raft rail rain ranch raven reef ribbon rice ridge ring river robin rocket
roof root rope rose ruby saddle sage sail salmon salt sand satin school scroll sea seal seed
shadow sheep shelf shell ship shirt shoe shore silver sky sled smoke snail snow soap soil song
soup spark spice spider spring spruce squash stable star steam steel storm stove straw stream
street string summer sun swan table tailor temple tent thorn thread throne thunder tide tiger
timber tomato torch tower trail train tree truck trumpet tulip tunnel turtle umbrella valley
velvet vessel village vine violet violin wagon walrus water wave wax well whale wheel willow
window winter wolf wood wool yacht yarn zebra zinc
"""

WORDS = tuple(_TEXT.split())
